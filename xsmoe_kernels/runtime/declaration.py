"""Declaration of an operator: arguments and results, from which schemas, autograd and the list variant are derived."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any


@dataclass(frozen=True)
class Input:
    """An argument of an operator.

    Attributes:
        name: as in the schema.
        type: in the language of torch's schemas, such as "Tensor", "Tensor?", "SymInt" or "bool".
        grad: whether the operator is differentiable with respect to it.
        backward: whether the backward operator gets it.
    """

    name: str
    type: str = "Tensor"
    grad: bool = False
    backward: bool = True

    @property
    def is_tensor(self) -> bool:
        """Whether it is a Tensor, perhaps an optional one."""
        return self.type.startswith("Tensor")


@dataclass(frozen=True)
class Operator:
    """An operator `xsmoe::<name>`: a function of `inputs` and of `str backend`, which every schema ends with.

    Attributes:
        name: without the namespace.
        inputs: the arguments. The first is a Tensor, which determines device and dtype.
        outputs: the names of the results, all of them Tensors. Only the first one has a gradient.
        saved: the outputs that the backward operator gets.
        lists: whether every argument and result is a list with an entry for each call of another operator.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    saved: tuple[str, ...] = ()
    lists: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(one.name for one in self.inputs)

    @property
    def differentiable(self) -> tuple[Input, ...]:
        """The inputs that have a gradient, in order."""
        return tuple(one for one in self.inputs if one.grad)

    @property
    def schema(self) -> str:
        """The arguments and results in the language of torch's schemas, without the name."""
        each = "[]" if self.lists else ""
        inputs = "".join(f"{one.type}{each} {one.name}, " for one in self.inputs)
        outputs = ", ".join(f"Tensor{each} {name}" for name in self.outputs)
        return f"({inputs}str backend) -> ({outputs})"

    def backward(self) -> "Operator":
        """Return the declaration of the backward operator.

        Its arguments are the gradient of the first output, then the inputs with `backward` in their order, with the
        saved outputs ahead of the first one that is no Tensor, then for each differentiable input whether its gradient
        is needed, if there are several. Its results are the gradients.
        """
        inputs = [one for one in self.inputs if one.backward]
        tensors = next((place for place, one in enumerate(inputs) if not one.is_tensor), len(inputs))
        inputs[tensors:tensors] = map(Input, self.saved)
        wanted = self.differentiable
        needs = [Input(f"need_{one.name}", "bool") for one in wanted] if len(wanted) > 1 else []
        arguments = (Input("grad"), *(replace(one, grad=False) for one in inputs), *needs)
        return Operator(f"{self.name}_backward", arguments, tuple(one.name for one in wanted), lists=self.lists)

    def as_lists(self, name: str) -> "Operator":
        """Return the declaration of `name`, which runs several calls of this operator."""
        return replace(self, name=name, lists=True)


def pick(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return a function that gives the entries of a sequence at `places`, as a tuple; fast enough for every call."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


def by_name(function: Callable[..., Any], names: Iterable[str]) -> Callable[[Sequence[Any]], Any]:
    """Return a function that calls `function` with those of the arguments, in the order of `names`, that it names.

    Raises:
        TypeError: `function` has a parameter that is not among `names`.
    """
    known = list(names)
    parameters = list(inspect.signature(function).parameters)
    if unknown := [name for name in parameters if name not in known]:
        raise TypeError(f"{function.__qualname__} has parameters that are no arguments of the operator: {unknown}")
    if parameters == known:
        return lambda arguments: function(*arguments)
    chosen = pick([known.index(name) for name in parameters])
    return lambda arguments: function(*chosen(arguments))
