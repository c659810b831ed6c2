"""What commands print: tables, facts, and lines beside a progress bar."""

import sys
from typing import Any


def show_facts(facts: dict[str, Any], indent: int = 0) -> None:
    """Names and values, one to a line; nested ones indented, empty ones left out."""
    width = max((len(str(key)) for key in facts), default=0)
    for key, value in facts.items():
        if value is None or value == [] or value == {}:
            continue
        if isinstance(value, dict) and indent and not any(isinstance(inner, dict) for inner in value.values()):
            counts = "  ".join(f"{name} {cell(inner)}" for name, inner in value.items())
            print(" " * indent + f"{key!s:<{width}}  {counts}")
        elif isinstance(value, dict):
            print(" " * indent + str(key))
            show_facts(value, indent + 2)
        else:
            print(" " * indent + f"{str(key).replace('_', ' '):<{width}}  {cell(value)}")


def cell(value: object) -> str:
    """A plain value as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value):
        return f"{cell(value[0])} to {cell(value[1])}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return "" if value is None else str(value)


def show_cards(cards: list[dict[str, Any]]) -> None:
    """A table of the data sets; one below the other where the terminal is too narrow for it."""
    from rich.table import Table

    table = Table(*cards[0], box=None, pad_edge=False)
    rows = [{name: "not here" if value is None else cell(value) for name, value in card.items()} for card in cards]
    for row in rows:
        table.add_row(*row.values())
    screen = console()
    if screen.measure(table, options=screen.options.update(max_width=1000)).maximum <= screen.width:
        screen.print(table)
        return
    for row in rows:
        print(row.pop("name"))
        show_facts(row, indent=2)


def console() -> Any:
    """A rich console for stdout."""
    from rich.console import Console

    # Piped, a table is never folded or cut: rich would assume 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=1000)


def show_outcome(outcome: Any) -> None:
    """Metrics by split, and where model and report lie."""
    from rich.table import Table

    for split, evaluation in outcome.evaluations.items():
        title = f"{split} ({evaluation.evaluated} rows)"
        table = Table("", title, "95 % interval", box=None, pad_edge=False)
        for row in evaluation.summary_rows():
            table.add_row(*row)
        console().print(table)
    if outcome.trained is not None:
        print(f"model:  {outcome.trained.model}")
    if outcome.report is not None:
        print(f"report: {outcome.report}")


def say(text: str) -> None:
    """A line on stderr, above a progress bar where there is one."""
    if "tqdm" in sys.modules:
        # A progress bar may be on the line; tqdm puts the text above it.
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
