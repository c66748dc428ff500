"""Finds out which manager to talk to, and with which key. The client's only reader of environment variables.

``ATELIER_API_URL`` and ``ATELIER_API_KEY``, else the token file that a manager of this user keeps in its data folder.
A local key is never sent to another address than the one that stands beside it in that file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from atelier.client.addresses import is_same_server, normalise_api_url
from atelier.model.errors import AuthenticationError, HostError
from atelier.model.layout import DataLayout

DEFAULT_API_URL = "http://127.0.0.1:7420"
_TOKEN_FILE_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a manager listens (``http://127.0.0.1:7420``, without ``/api/v1``) and the key that it accepts."""

    api_url: str
    api_key: str = field(repr=False)


def find_data_directory(data_dir: str | Path = "", variables: Mapping[str, str] | None = None) -> Path:
    """``data_dir``, else ``ATELIER_DATA_DIR``, else ``$XDG_DATA_HOME/atelier``, else ``~/.local/share/atelier``.

    The same rule as the manager's own settings; a test holds the two together.
    """
    variables = os.environ if variables is None else variables
    given = str(data_dir) or variables.get("ATELIER_DATA_DIR", "")
    if given:
        return Path(given).absolute()
    xdg = variables.get("XDG_DATA_HOME", "")
    home = Path(variables.get("HOME") or Path.home())
    return (Path(xdg) if xdg.startswith("/") else home / ".local/share") / "atelier"


def find_local_data(
    *, api_url: str = "", data_dir: str | Path = "", variables: Mapping[str, str] | None = None
) -> DataLayout | None:
    """The data folder of the manager that ``find_endpoint`` finds, if it is one of this user's on this machine; None
    when an address is given that is not in that folder's token file."""
    variables = os.environ if variables is None else variables
    url = api_url or variables.get("ATELIER_API_URL", "")
    data = DataLayout(find_data_directory(data_dir, variables))
    if not url:
        return data
    local = _read_token_file(data.token_file)
    return data if local is not None and is_same_server(normalise_api_url(url), local.api_url) else None


def find_endpoint(
    *,
    api_url: str = "",
    api_key: str = "",
    data_dir: str | Path = "",
    variables: Mapping[str, str] | None = None,
) -> Endpoint:
    """The manager to talk to: arguments first, then the environment, then the local token file.

    Raises AuthenticationError (``no_api_key``) when no key is known for the address, InvalidRequestError for an
    address that is none, HostError when the token file cannot be read.
    """
    variables = os.environ if variables is None else variables
    url = api_url or variables.get("ATELIER_API_URL", "")
    key = api_key or variables.get("ATELIER_API_KEY", "")
    if url and key:
        return Endpoint(normalise_api_url(url), key)
    token_file = DataLayout(find_data_directory(data_dir, variables)).token_file
    local = _read_token_file(token_file)
    if key:
        return Endpoint(normalise_api_url(local.api_url if local else DEFAULT_API_URL), key)
    if url:
        url = normalise_api_url(url)
        if local is not None and is_same_server(url, local.api_url):
            return Endpoint(url, local.api_key)
        raise AuthenticationError(
            f"no key is known for the manager at {url}",
            code="no_api_key",
            hint="set ATELIER_API_KEY (on the manager's machine the key stands in token.json in its data folder)",
        )
    if local is None:
        raise AuthenticationError(
            f"no manager is known here: {token_file} does not exist",
            code="no_api_key",
            hint="start one with `atelier up`, or set ATELIER_API_URL and ATELIER_API_KEY",
        )
    return local


class HasEndpoint(Protocol):
    @property
    def endpoint(self) -> Endpoint: ...


def endpoint_of(connection: HasEndpoint | None, api_url: str, api_key: str) -> Endpoint:
    """That of a connection that is lent, else what ``find_endpoint`` finds. Raises what that raises."""
    return connection.endpoint if connection is not None else find_endpoint(api_url=api_url, api_key=api_key)


def _read_token_file(path: Path) -> Endpoint | None:
    try:
        with path.open("rb") as file:
            content = file.read(_TOKEN_FILE_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise HostError(
            f"the token file {path} may not be read by this user",
            code="token_file_unreadable",
            hint="run this as the user who runs the manager, or set ATELIER_API_URL and ATELIER_API_KEY",
        ) from error
    except OSError as error:
        raise HostError(
            f"the token file {path} cannot be read: {error.strerror}",
            code="token_file_unreadable",
            hint="set ATELIER_API_URL and ATELIER_API_KEY instead",
        ) from error
    try:
        parsed: object = json.loads(content)
    except ValueError:
        parsed = None
    fields = cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}
    url, key = fields.get("api_url"), fields.get("api_key")
    if not isinstance(url, str) or not isinstance(key, str) or not key:
        raise HostError(
            f"the token file {path} is damaged",
            code="token_file_damaged",
            hint='restart the manager, which writes it anew: {"api_url": ..., "api_key": ...}',
        )
    return Endpoint(normalise_api_url(url), key)
