"""The settings of a run: as its config writes them, and as a start compares them with those of the one before."""

from __future__ import annotations

import json
import re
from importlib import import_module
from typing import Any

import yaml
from jsonargparse import ArgumentParser

__all__ = ["comparable", "deciding", "dump_config"]

# Settings that may differ when a run is resumed: paths, what is shown, and what cannot change a number.
_FREE = {
    "": {
        "run", "save_every_minutes", "collective_timeout", "config", "ckpt_path", "weights_only", "maps",
        "on_nonfinite", "measure_last",
    },
    "trainer": {
        "accelerator", "devices", "num_nodes", "default_root_dir", "logger", "enable_progress_bar", "profiler",
        "enable_model_summary", "log_every_n_steps", "max_time", "detect_anomaly", "plugins",
    },
    "data": {
        # The batch size goes with the number of processes; with the same number, the data module refuses another one.
        "batch_size",
        "train", "val", "test", "root", "pin_memory", "persistent_workers", "max_fault_fraction", "verify", "retries",
    },
}  # fmt: skip


class _ConfigDumper(yaml.SafeDumper):  # type: ignore[misc] # PyYAML has no types
    """Quotes every text that jsonargparse would read as a number, which PyYAML's own dumper does not ("1e-5")."""


_ConfigDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?"),
    list("-+.0123456789"),
)


def dump_config(settings: Any) -> str:
    """A config as YAML that is read back as it was."""
    options: dict[str, Any] = {"default_flow_style": False, "allow_unicode": True, "sort_keys": False}
    return str(yaml.dump(settings, Dumper=_ConfigDumper, **options))


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that cannot change a number; removes them."""
    for group, names in _FREE.items():
        at = settings.get(group) or {} if group else settings
        at = at.get("init_args", at)
        for name in names:
            at.pop(name, None)
    return settings


def comparable(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that another version may have begun, without what is free and with what is new.

    An option that the other version had not has its default, which does what that version did.
    """
    was = deciding(was)
    # Several processes take the strategy "auto" for "ddp".
    trainers = [each.get("trainer") or {} for each in (was, now)]
    if {each.get("strategy") for each in trainers if isinstance(each.get("strategy"), str)} == {"auto", "ddp"}:
        trainers[0]["strategy"] = trainers[1]["strategy"]
    for group in ("model", "data"):
        old, new = (each.get(group) or {} for each in (was, now))
        if old.get("class_path") != new.get("class_path") or not isinstance(new.get("init_args"), dict):
            continue
        parser = ArgumentParser(exit_on_error=False)
        module, _, name = new["class_path"].rpartition(".")
        parser.add_class_arguments(getattr(import_module(module), name), sub_configs=False)
        defaults = json.loads(parser.dump(parser.get_defaults(), format="json", skip_validation=True))
        own = old.setdefault("init_args", {})
        own |= {
            name: value
            for name, value in new["init_args"].items()
            if name not in own and name in defaults and defaults[name] == value
        }
    return was
