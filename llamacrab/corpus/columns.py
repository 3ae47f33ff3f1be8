"""The kept columns of a source: each has one type in all rows of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llamacrab._support.extras import require

# Whole numbers up to this one are exact in a float64.
EXACT = 2**53


class Columns:
    """Gives every column one type, which widens with the values: int64 to float64, null to any.

    A source is always read from its first row, so the types do not depend on where a job was
    interrupted.

    Parameters
    ----------
    names : sequence of str
        The columns.

    Attributes
    ----------
    types : dict of str to pyarrow.DataType
        The types so far.
    widened : bool
        Whether a type has changed, so that earlier shards may have another one.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if names:
            self._pa = require("pyarrow", extra="corpus")
            self._compute = require("pyarrow.compute", extra="corpus")
        self._names = names
        self._inexact: set[str] = set()
        self.types: dict[str, Any] = {}
        self.widened = False

    def take(self, rows: Any) -> tuple[Any, dict[int, str]]:
        """Return the columns of a table or of a list of dicts, and the errors by row.

        A value that does not fit becomes null. Without columns, None stands for the table.
        """
        if not self._names:
            return None, {}
        wrong: dict[int, str] = {}
        columns = {}
        for name in self._names:
            if isinstance(rows, list):
                values = [row.get(name) for row in rows]
                columns[name] = self._column(name, values, self._pa.array, wrong)
            else:
                column = rows.column(name)
                columns[name] = self._column(name, column, lambda part: part, wrong)
        return self._pa.table(columns), wrong

    def _column(
        self, name: str, values: Any, to_arrow: Callable[[Any], Any], wrong: dict[int, str]
    ) -> Any:
        failures = (self._pa.ArrowException, TypeError, ValueError, OverflowError)
        try:
            return self._fitted(name, to_arrow(values))
        except failures:
            pass
        # One value at a time, to find out which of them does not fit.
        parts = []
        for i in range(len(values)):
            try:
                parts.append(self._fitted(name, to_arrow(values[i : i + 1])))
            except failures:
                value = values[i]
                shown = repr(value if isinstance(values, list) else value.as_py())
                shown = shown if len(shown) < 60 else f"{shown[:57]}..."
                wrong[i] = f"column {name}: {shown} does not fit {self._known(name)}"
                parts.append(self._pa.nulls(1, self._known(name)))
        known = self._known(name)
        chunks = [
            chunk
            for part in parts
            for chunk in (part.chunks if hasattr(part, "chunks") else [part])
        ]
        return self._pa.chunked_array([chunk.cast(known) for chunk in chunks], type=known)

    def _known(self, name: str) -> Any:
        return self.types.get(name, self._pa.null())

    def _fitted(self, name: str, values: Any) -> Any:
        """Return values in the type of their column, which may widen; raise if they do not fit."""
        pa, known = self._pa, self._known(name)
        schemas = [pa.schema([(name, one)]) for one in (known, values.type)]
        grown = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        if pa.types.is_floating(grown) and name in self._inexact:
            raise pa.ArrowInvalid(f"column {name} has whole numbers that no float holds")
        fitted = values if values.type == grown else values.cast(grown)
        if pa.types.is_integer(values.type):
            ends = self._compute.min_max(values).as_py()
            if max(-(ends["min"] or 0), ends["max"] or 0) > EXACT:
                self._inexact.add(name)
        self.widened |= name in self.types and grown != known
        self.types[name] = grown
        return fitted
