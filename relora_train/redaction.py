"""Addresses as messages may show them: without user name, password and query, where people put secrets. Light."""

from __future__ import annotations


def without_secrets(url: str) -> str:
    """scheme://host:port/path of a URL that holds more; of a text that is no URL, what lies between '@' and '?'."""
    if not holds_secrets(url):
        return url
    scheme, separator, rest = url.partition("://")
    address = (rest if separator else url).partition("?")[0].partition("#")[0]
    host, slash, path = address.partition("/")
    if "@" in path and "@" not in host:  # a '/' in the password
        host, slash, path = path.rpartition("@")[2].partition("/")
    return f"{scheme if separator else ''}{separator}{host.rpartition('@')[2]}{slash}{path}"


def holds_secrets(url: str) -> bool:
    """Whether an address has a part that may be a secret."""
    return "@" in url or "?" in url
