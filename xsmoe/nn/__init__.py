"""Modules of the recommender: expert bank, side network, item encoder and user encoder."""

from xsmoe.nn.batch import Batch
from xsmoe.nn.experts import Expanded, ExpertBank, Pruned
from xsmoe.nn.item_encoder import XSMoE
from xsmoe.nn.item_ids import ItemIds
from xsmoe.nn.lazy_adam import LazyAdam
from xsmoe.nn.recommender import Recommender
from xsmoe.nn.side_network import SideMoE
from xsmoe.nn.user_encoder import UserEncoder

__all__ = [
    "Batch",
    "Expanded",
    "ExpertBank",
    "ItemIds",
    "LazyAdam",
    "Pruned",
    "Recommender",
    "SideMoE",
    "UserEncoder",
    "XSMoE",
]
