"""What results share: how they are printed and shown in notebooks. `views` is imported then, so that `import tl_lenses` stays light."""

from typing import Any


class Shown:
    """A result that `views` draws; `print` writes what `rich` shows of it."""

    @property
    def _views(self) -> Any:
        from tl_lenses import views

        return views

    def __str__(self) -> str:
        return self._views.to_text(self)


class Tabled(Shown):
    """A result that is a table of plain rows."""

    def _table(self) -> tuple[str, list[str], list[list[Any]], str]:
        """Title, columns, rows and note."""
        raise NotImplementedError

    def __rich__(self) -> Any:
        return self._views.rows_table(*self._table())

    def _repr_html_(self) -> str:
        return self._views.rows_html(*self._table())
