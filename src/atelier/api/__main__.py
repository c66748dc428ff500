"""``python -m atelier.api``: prints the API's description, which is checked in as openapi/manager.json."""

from __future__ import annotations

import json
import sys

from atelier.api.application import describe_api

if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe_api().openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
