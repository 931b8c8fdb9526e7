"""Where a running engine has its experts, as a file for `lorashard split --expert-map`.

The first rank writes it after each rearrangement, into the directory that LORASHARD_EXPERT_MAPS names.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.expert_maps import expert_map_document
from lorashard.vllm_plugin.load.loader import AdapterLoader

logger = logging.getLogger("vllm.lorashard")

_NAME = "expert-map.json"


def publish_maps(loader: AdapterLoader, what: str) -> None:
    """Write the maps of now, and log where. Never raises: a rearrangement is over by then.

    what: has happened, as a sentence without full stop.
    """
    if loader.ep_rank != 0 or loader.maps is None:
        return
    directory = settings.expert_map_directory()
    if directory is None:
        logger.info("lorashard: %s", what)
        return
    path = Path(directory) / _NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{_NAME}.{os.getpid()}")
        staged.write_text(json.dumps(expert_map_document(loader.maps, loader.ep_size)))
        staged.replace(path)
    except OSError as err:
        logger.warning("lorashard: cannot write where the experts are: %s", err)
        return
    logger.info(
        "lorashard: %s; the map for `lorashard split --expert-map` is %s",
        what,
        path,
    )
