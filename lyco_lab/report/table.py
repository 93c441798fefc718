"""The results as the page shows them: numbers in their column's form, the best of them marked."""

import math
from dataclasses import dataclass

import pandas as pd

from lyco_lab.analyse.table import BASE, quoted
from lyco_lab.evaluate.stage import REAL

NAMES = {BASE: "base model", REAL: "training images"}
THIN = "\N{THIN SPACE}"


@dataclass(frozen=True)
class Form:
    """How a column's numbers are written: in units of 10^-exponent, with so many decimals."""

    exponent: int
    decimals: int

    @property
    def unit(self) -> str:
        superscripts = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
        return f"10⁻{str(self.exponent).translate(superscripts)}" if self.exponent else ""


@dataclass(frozen=True)
class TableCell:
    text: str
    error: str
    best: bool


@dataclass(frozen=True)
class TableRow:
    label: str
    role: str
    series: int
    cells: tuple[TableCell, ...]
    params: str
    seconds: str


def table_rows(
    rows: pd.DataFrame, numbers: dict[str, int], forms: dict[str, Form]
) -> list[TableRow]:
    """One concept's rows; the best of each column among the runs is marked, ties included.

    Values equal at the digits shown are ties. A column in which all runs tie marks none.
    """
    is_run = ~rows["adapter"].isin(list(NAMES))
    best = {}
    for column, (metric, _) in quoted().items():
        among = rows[column][is_run].dropna()
        texts = {written(value, forms[column]) for value in among}
        top = among.max() if metric.better == "higher" else among.min()
        best[column] = written(top, forms[column]) if len(texts) > 1 else None
    found = []
    for row in rows.to_dict("records"):
        role = row["adapter"] if row["adapter"] in NAMES else "run"
        cells = []
        for column in quoted():
            text = written(row[column], forms[column])
            error = row[f"{column}_se"]
            cells.append(
                TableCell(
                    text,
                    written(error, forms[column]) if error else "",
                    role == "run" and text == best[column],
                )
            )
        params = f"{int(row['trainable_params']):,}".replace(",", THIN) if role == "run" else ""
        seconds = f"{row['train_seconds']:.0f} s" if role == "run" else ""
        number = numbers.get(row["label"], 0)
        found.append(TableRow(row["label"], role, number, tuple(cells), params, seconds))
    return found


def form_of(values: pd.Series) -> Form:
    """So that a column's usual value shows two digits: thousandths in units of 10^-3, and so on."""
    sizes = values.abs()[values.abs() > 0]
    if sizes.empty:
        return Form(0, 2)
    middle = sizes.median()
    exponent = 0 if middle >= 0.01 else 3 * math.ceil(-math.log10(middle) / 3)
    return Form(exponent, 0 if middle >= 100 else 2)


def written(value: float, form: Form) -> str:
    """In the column's form; "" for nothing, and no minus sign before a zero."""
    scaled = value * 10**form.exponent
    return "" if math.isnan(value) else f"{scaled:z.{form.decimals}f}".replace("-", "−")
