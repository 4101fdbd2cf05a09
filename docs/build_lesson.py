"""Makes docs/lesson.ipynb from docs/lesson.py, its source, and executes it: `python docs/build_lesson.py`."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

DOCS = Path(__file__).resolve().parent
SOURCE, NOTEBOOK = DOCS / "lesson.py", DOCS / "lesson.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TIMEOUT_SEC = 900
"""Longest time for one cell: far more than any takes, for machines that are busy."""


def read_source() -> NotebookNode:
    """The notebook that the source describes, without outputs; equal sources give equal notebooks."""
    notebook = jupytext.read(SOURCE, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def execute(notebook: NotebookNode) -> NotebookNode:
    """Runs all cells in a fresh kernel, in the folder of the notebook; CellExecutionError where one fails."""
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_SEC,
        startup_timeout=TIMEOUT_SEC,
        record_timing=False,
        resources={"metadata": {"path": str(DOCS)}},
    )
    executed: NotebookNode = client.execute()
    executed.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return executed


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring parts of one stream as one, however they were cut up."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def text_of(notebook: NotebookNode) -> str:
    """All that the outputs say in words."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            parts += [
                output.get("text", ""),
                *output.get("traceback", []),
                output.get("data", {}).get("text/plain", ""),
            ]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(parts))


def main() -> None:
    """Writes the executed notebook."""
    nbformat.write(execute(read_source()), NOTEBOOK)


if __name__ == "__main__":
    main()
