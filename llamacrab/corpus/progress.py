"""Progress of a job: a bar for people, a dict for programs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from llamacrab._support.extras import require

if TYPE_CHECKING:
    from collections.abc import Callable


class Progress:
    """Reports the rows that are embedded.

    Parameters
    ----------
    n_resumed : int
        Rows that earlier runs have finished.
    n_total : int or None
        Rows of the source, if known.
    bar : bool
        Show a bar (extra ``progress``).
    call : callable, optional
        Called with a dict each time.
    """

    def __init__(
        self,
        n_resumed: int,
        n_total: int | None,
        *,
        bar: bool,
        call: Callable[[dict[str, Any]], Any] | None,
    ) -> None:
        self._began = time.monotonic()
        self._n_resumed = n_resumed
        self._n_total = n_total
        self._call = call
        self._bar = None
        if bar:
            self._bar = require("tqdm", extra="progress").tqdm(
                initial=n_resumed, total=n_total, unit=" texts"
            )

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def report(self, n_rows: int, n_tokens: int, *, complete: bool = False) -> None:
        """Report the rows that are done, and the tokens that this run has computed."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (n_rows - self._n_resumed) / seconds
        if self._bar is not None:
            self._bar.set_postfix_str(f"{n_tokens / seconds:,.0f} tokens/s", refresh=False)
            self._bar.update(n_rows - self._bar.n)
        if self._call is not None:
            left = None if self._n_total is None or not rate else self._n_total - n_rows
            self._call(
                {
                    "rows": n_rows,
                    "total": self._n_total,
                    "seconds": round(seconds, 3),
                    "rows_per_second": round(rate, 1),
                    "tokens_per_second": round(n_tokens / seconds, 1),
                    "seconds_left": None if left is None else round(left / rate, 1),
                    "complete": complete,
                }
            )
