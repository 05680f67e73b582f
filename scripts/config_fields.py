"""Note the settings of model types that the installed transformers has and no release before had.

    python scripts/config_fields.py            # with each supported release in turn, the oldest first
    python scripts/config_fields.py --check    # fails if a type of this release is missing

Types that are in the file stay as they are: that is what the file is for (see `cakekv.config_fields`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from cakekv.config_fields import FILE


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--check", action="store_true", help="write nothing; fail if there is something to write")
    check = arguments.parse_args().check
    logging.set_verbosity_error()
    known: dict[str, str] = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = dict(types())
    inherited = found.pop("") if "" not in known else set(known[""].split())
    new = {name: " ".join(sorted(names - inherited)) for name, names in found.items() if name not in known}
    if "" not in known:
        new[""] = " ".join(sorted(inherited))
    if new and check:
        sys.exit(
            f"{len(new)} model types are not in {FILE.name}, {', '.join(sorted(new)[:5])} among them: run {__file__}"
        )
    table = dict(sorted((known | new).items()))
    FILE.write_text(json.dumps(table, indent=0) + "\n")
    print(f"{len(new)} of {len(table)} model types are new")


def types() -> Iterator[tuple[str, set[str]]]:
    """Every model type of a causal or multimodal language model, and of their parts, with the names of its settings."""
    yield "", set(PreTrainedConfig().to_dict())
    names = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}) for name in names]
    for model_type in sorted(set().union(*mappings)):
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception as error:  # a few cannot be made without settings
            print(f"{model_type}: {error!r}", file=sys.stderr)
            continue
        yield from _parts(json.loads(config.to_json_string(use_diff=False)))


def _parts(value: Any) -> Iterator[tuple[str, set[str]]]:
    if isinstance(value, dict):
        if value.get("model_type"):
            yield value["model_type"], set(value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _parts(item)


if __name__ == "__main__":
    main()
