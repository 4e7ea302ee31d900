"""The clock: date and time, of any time zone that the system knows."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from kllm.tools.tool import ToolError


def clock(timezone: str = "") -> str:
    """Tells the current date, weekday and time.

    Args:
        timezone: a name such as "Asia/Shanghai" or "UTC"; the local one if empty.
    """
    try:
        zone = ZoneInfo(timezone) if timezone else None
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ToolError(f"no time zone named {timezone!r}; names are like Asia/Shanghai") from None
    now = datetime.now(zone).astimezone(zone)
    offset = now.strftime("%z")
    return f"{now:%Y-%m-%d %A %H:%M:%S} UTC{offset[:3]}:{offset[3:]}"
