"""Addresses without user name, password and query, in which people put secrets: safe in a message."""

import re

from relora_train.errors import ConfigError

_SCHEME = r"^[A-Za-z][A-Za-z0-9+.-]*://"
ADDRESS_WITH_SECRETS = rf"{_SCHEME}([^/]*@|[^/@]*:.*@|.*\?[A-Za-z0-9_.%-]+=)|^(?!series:|file:)[^/:]+:(?!//).*@"
"""Found in USER@HOST, in USER:PASSWORD@HOST with any password, with and without scheme, and in a URL's ?NAME=VALUE.

A regular expression of Python and of JSON Schema. A '?' alone is a glob's; write ./a:b@c for a file of that name.
"""


_SHOWN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]*@|(?<=://)([^\s'\"?]*)\?[A-Za-z0-9_.%-]+=[^\s'\"]*")


def masked(text: str) -> str:
    """Return a text in which no address with a scheme shows a user name, password or query."""
    return _SHOWN.sub(lambda found: found[1] or found[2], text)


def refuse_secrets(address: str) -> str:
    """Return an address of a store, file, checkpoint or hub entry that holds no credentials; else raise ConfigError."""
    if re.search(ADDRESS_WITH_SECRETS, address):
        raise ConfigError(
            f"{without_secrets(address)!r} is given with credentials, and an address is recorded and shown. Leave them "
            "out; they belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN or another standard source."
        )
    return address


def without_secrets(url: str) -> str:
    """Return scheme://host:port/path of a URL, or, if the text is no URL, what lies between '@' and '?'."""
    if not holds_secrets(url):
        return url
    scheme, separator, rest = url.partition("://")
    address = rest if separator else url
    if "?" in address.partition("@")[0] and "@" in address:  # in the password, or '@' in the query
        return f"{scheme if separator else ''}{separator}…"
    address = address.partition("?")[0].partition("#")[0]
    host, slash, path = address.partition("/")
    if "@" in path and "@" not in host:  # a '/' in the password
        host, slash, path = path.rpartition("@")[2].partition("/")
    return f"{scheme if separator else ''}{separator}{host.rpartition('@')[2]}{slash}{path}"


def holds_secrets(url: str) -> bool:
    """Return True if an address has a part that may be a secret."""
    return "@" in url or "?" in url
