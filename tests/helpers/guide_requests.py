"""The requests of the guide, as its reader would send them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from servers import RunningServer

Json = dict[str, Any]

_parts = re.split(r"^### (.+)\n", (Path(__file__).parent / "guide_requests.sh").read_text(), flags=re.M)
REQUESTS = dict(zip(_parts[1::2], _parts[2::2], strict=True))
CURLS = [title for title in REQUESTS if title != "startup.py"]
CREATES = [title for title in CURLS if title.startswith("create")]
USES = [title for title in CURLS if " with " in title]


def addressed(title: str, server: RunningServer) -> str:
    assert "localhost:8080" in REQUESTS[title]
    return REQUESTS[title].replace("localhost:8080", server.url.removeprefix("http://"))


def curl(title: str, server: RunningServer) -> Json:
    command = ["bash", "-c", addressed(title, server)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def cache_of(title: str) -> str:
    return title.rpartition(" ")[2]
