"""Names for runs: what one is, and what tells several apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tesserafl.run.record import Record

_LABELLED = {"seed", "method.ratio", "data.source", "data.path", "data.name", "data.subset"} | {
    f"data.{name}" for name in ("partition", "alpha", "classes_per_client", "partition_column")
}
"""Settings that a label column already shows."""


def ratio_label(method: Mapping[str, Any]) -> str:
    """Width ratios as fractions: `1, 1/2, 1/4`; empty for a method without."""
    return ", ".join(str(Fraction(r).limit_denominator(100)) for r in method.get("ratio", ()))


def data_label(data: Mapping[str, Any]) -> str:
    """The data set in a word or two."""
    named = " ".join(part for part in (data["name"], data["subset"]) if part)
    return Path(data["path"]).name if data["path"] else named or str(data["source"])


def partition_label(data: Mapping[str, Any]) -> str:
    """How the data is spread, with the one number that matters."""
    kind = str(data["partition"])
    field = {"dirichlet": "alpha", "shards": "classes_per_client", "column": "partition_column"}
    return f"{kind}({data[field[kind]]})" if kind in field else kind


def labels_of(groups: list[list[Record]]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """What tells the rows apart, and what they share."""
    configs = [group[0].config for group in groups]
    flat = [_flat(config) for config in configs]
    labels = [
        {
            "method": str(config["method"]["name"]),
            "ratio": ratio_label(config["method"]),
            "data": data_label(config["data"]),
            "partition": partition_label(config["data"]),
            "model": str(config["model"]["name"]),
            "settings": ", ".join(f"{key}={own[key]}" for key in own if _differs(key, own, flat)),
        }
        for config, own in zip(configs, flat, strict=True)
    ]
    same = {key: value for key, value in labels[0].items() if all(o[key] == value for o in labels)}
    if len(groups) == 1:
        del same["method"]
    labels = [{key: value for key, value in o.items() if key not in same} for o in labels]
    states = [sum(record.finish is None for record in group) for group in groups]
    names = {name_of(label) for label in labels}
    for label, group, unfinished in zip(labels, groups, states, strict=True):
        if len(names) < len(groups) or "" in names:
            label["run"] = ", ".join(record.folder.name for record in group)
        if any(states):
            label["state"] = f"{unfinished} of {len(group)} unfinished" if unfinished else ""
    return labels, {key: value for key, value in same.items() if value}


def name_of(label: Mapping[str, str]) -> str:
    """A label in one line."""
    return ", ".join(f"ratio {v}" if k == "ratio" else v for k, v in label.items() if v)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _differs(key: str, own: Mapping[str, str], everyone: Sequence[Mapping[str, str]]) -> bool:
    section = key.split(".")[0]
    # A method's settings are held against those of the same method only.
    name = f"{section}.name" if section in ("method", "model") else "seed"
    peers = [o for o in everyone if name == "seed" or o[name] == own[name]]
    return key not in _LABELLED and any(other.get(key) != own[key] for other in peers)
