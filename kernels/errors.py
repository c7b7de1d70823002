"""Errors every kernel shares."""


class NotSupported(ValueError):
    """An implementation cannot take these arguments here; impl="auto" then tries the next one."""
