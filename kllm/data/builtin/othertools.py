"""Tools that are on offer in some conversations beside the real ones, and are never the right one.

They are found like anybody's own tool, as `kllm.data.builtin.othertools:weather`, and do nothing.
"""

from __future__ import annotations

from kllm.tools.tool import ToolError


def weather(city: str) -> str:
    """Tells the weather of a city."""
    raise ToolError(f"no weather of {city}")


def translate(text: str, language: str) -> str:
    """Translates a text.

    Args:
        language: to translate to.
    """
    raise ToolError(f"cannot translate {text} to {language}")


def search(query: str) -> str:
    """Searches the web."""
    raise ToolError(f"nothing found for {query}")


def remind(text: str, minutes: int) -> str:
    """Reminds the user of something after some minutes."""
    raise ToolError(f"cannot remind of {text} in {minutes} minutes")


def price(product: str) -> str:
    """Tells what a product costs.

    Args:
        product: its name.
    """
    raise ToolError(f"no price of {product}")


TRAINED = tuple(f"{__name__}:{tool.__name__}" for tool in (weather, translate, search))
HELD_OUT = tuple(f"{__name__}:{tool.__name__}" for tool in (remind, price))
