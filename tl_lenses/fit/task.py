"""What a fit of a tuned lens is asked to do."""

from dataclasses import dataclass, field

from tl_lenses.fit.settings import Settings
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel
from tl_lenses.text.batches import Text
from tl_lenses.translators import Row, Translators


@dataclass(frozen=True)
class Task:
    """What is trained: some rows of a model, on a text."""

    model: LensModel
    text: Text
    rows: list[Row]  # `(source site, target site)` of each map
    settings: Settings  # with a learning rate, see `Settings.at_width`
    init: Translators | None = None  # translators to start from, where `settings.init` says so
    hooks: list[Hook] = field(default_factory=list)
    held_out: Text | None = None  # text for `look`, or None
