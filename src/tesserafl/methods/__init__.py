"""Federated methods, one file per paper."""

from __future__ import annotations

from tesserafl.methods.depthfl import DepthFL
from tesserafl.methods.dpsgd import DPSGD
from tesserafl.methods.equal_finish import EqualFinish
from tesserafl.methods.fedadapter import FedAdapter
from tesserafl.methods.fedasync import FedAsync
from tesserafl.methods.fedavg import FedAvg
from tesserafl.methods.fedbrb import FedBRB
from tesserafl.methods.fedbuff import FedBuff
from tesserafl.methods.fedecover import FedEcover
from tesserafl.methods.federated_dropout import FederatedDropout
from tesserafl.methods.fedfmsl import FedFMSL
from tesserafl.methods.fedit import FedIT
from tesserafl.methods.fednova import FedNova
from tesserafl.methods.fedrolex import FedRolex
from tesserafl.methods.fedsa_lora import FedSALoRA
from tesserafl.methods.ffa_lora import FFALoRA
from tesserafl.methods.flexlora import FlexLoRA
from tesserafl.methods.flm import FLM
from tesserafl.methods.flora import FLoRA
from tesserafl.methods.heterofl import HeteroFL
from tesserafl.methods.hetlora import HetLoRA
from tesserafl.methods.hierfavg import HierFAVG
from tesserafl.methods.hwamei import Hwamei
from tesserafl.methods.local import Local
from tesserafl.methods.matched_averaging import MatchedAveraging
from tesserafl.methods.msfusion import MSfusion
from tesserafl.methods.pfl_moe import PFLMoE
from tesserafl.methods.progressive import Progressive
from tesserafl.methods.random_depth import RandomDepth
from tesserafl.methods.ravan import Ravan
from tesserafl.methods.tomtit import Tomtit

MethodSettings = (
    FedAvg
    | HeteroFL
    | FederatedDropout
    | FedRolex
    | FedEcover
    | FedBRB
    | MSfusion
    | DPSGD
    | FedIT
    | FFALoRA
    | FlexLoRA
    | HetLoRA
    | FedSALoRA
    | FLoRA
    | Ravan
    | FedFMSL
    | PFLMoE
    | FedAdapter
    | FLM
    | RandomDepth
    | DepthFL
    | Progressive
    | Local
    | MatchedAveraging
    | EqualFinish
    | FedAsync
    | FedBuff
    | FedNova
    | HierFAVG
    | Hwamei
    | Tomtit
)

METHODS: dict[str, type[MethodSettings]] = {
    "fedavg": FedAvg,
    "heterofl": HeteroFL,
    "federated_dropout": FederatedDropout,
    "fedrolex": FedRolex,
    "fedecover": FedEcover,
    "fedbrb": FedBRB,
    "msfusion": MSfusion,
    "dpsgd": DPSGD,
    "fedit": FedIT,
    "ffa_lora": FFALoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "fedsa_lora": FedSALoRA,
    "flora": FLoRA,
    "ravan": Ravan,
    "fedfmsl": FedFMSL,
    "pfl_moe": PFLMoE,
    "fedadapter": FedAdapter,
    "flm": FLM,
    "random_depth": RandomDepth,
    "depthfl": DepthFL,
    "progressive": Progressive,
    "local": Local,
    "matched_averaging": MatchedAveraging,
    "hierfavg": HierFAVG,
    "fednova": FedNova,
    "fedbuff": FedBuff,
    "fedasync": FedAsync,
    "equal_finish": EqualFinish,
    "hwamei": Hwamei,
    "tomtit": Tomtit,
}

__all__ = [
    "DPSGD",
    "FLM",
    "METHODS",
    "DepthFL",
    "EqualFinish",
    "FFALoRA",
    "FLoRA",
    "FedAdapter",
    "FedAsync",
    "FedAvg",
    "FedBRB",
    "FedBuff",
    "FedEcover",
    "FedFMSL",
    "FedIT",
    "FedNova",
    "FedRolex",
    "FedSALoRA",
    "FederatedDropout",
    "FlexLoRA",
    "HetLoRA",
    "HeteroFL",
    "HierFAVG",
    "Hwamei",
    "Local",
    "MSfusion",
    "MatchedAveraging",
    "MethodSettings",
    "PFLMoE",
    "Progressive",
    "RandomDepth",
    "Ravan",
    "Tomtit",
]
