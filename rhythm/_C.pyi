"""The extension built from csrc/; see csrc/problem.hpp and csrc/bindings.cpp."""

View = tuple[int, list[int], tuple[int, int, int]]

to_the_end: int

def available_isas() -> list[str]: ...
def selected_isa() -> str: ...
def attention_statistics(
    *,
    dtype: str,
    heads: tuple[int, int, int],
    bounds: list[int],
    prompt_lens: list[int],
    row_bounds: list[int],
    q: View,
    k: View,
    v: View | None,
    scale: float,
    softcap: float,
    sliding_window: int,
    sinks: int,
    windows: list[int],
    horizons: list[tuple[int, int]],
    reduce: str,
    row_weights: tuple[int, int],
    given_lse: int,
    row_span: int,
    waad: int,
    fai: int,
    lse: int,
    also: dict[str, int],
    first: int,
    prompt_rows: bool,
    out: int,
    threads: int,
) -> None: ...
