"""Which of our user encoder's parameters is which of the published formulation's."""

_SUBLAYERS = {
    "attention.w_q.": "query.",
    "attention.w_k.": "key.",
    "attention.w_v.": "value.",
    "attention.fc.": "output.",
    "attention.layer_norm.": "attention_norm.",
    "feed_forward.w_1.": "inner.",
    "feed_forward.w_2.": "outer.",
    "feed_forward.layer_norm.": "feed_forward_norm.",
}
_TOP = {"position_embedding.": "positions.", "layer_norm.": "norm."}


def our_name(published: str) -> str:
    """`blocks.0.attention.w_q.weight` is our `blocks.0.query.weight`."""
    for theirs, ours in (_SUBLAYERS if published.startswith("blocks.") else _TOP).items():
        if theirs in published:
            return published.replace(theirs, ours, 1)
    raise KeyError(published)
