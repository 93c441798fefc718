"""Rows -> the table that a study's page and the paper quote, and the verdict on its pairs."""

from pathlib import Path

import pandas as pd

from lyco_lab.analyse import gamma_pair
from lyco_lab.analyse.gamma_pair import Verdict
from lyco_lab.analyse.table import study_folder, table
from lyco_lab.config import Study
from lyco_lab.errors import UserError
from lyco_lab.files import sweep
from lyco_lab.fold import TRAIN, shared
from lyco_lab.integrity import METRICS
from lyco_lab.record import Record

GAMMA = "gamma.csv"


def analyse(study: Study, root: Path) -> tuple[pd.DataFrame, list[Verdict]]:
    """Write a study's results.csv and, if it has pairs, gamma.csv; return what is in them."""
    sweep(study_folder(study, root))
    return table(study, root), verdicts(study, root)


def verdicts(study: Study, root: Path) -> list[Verdict]:
    """One verdict for each pair of the study."""
    found = []
    for gamma, rewritten in study.pairs:
        records = [Record(root / study.run(name).folder_name) for name in (gamma, rewritten)]
        for record in records:
            if shared(record):
                raise UserError(
                    f"{record.path} has the result of another run, and a pair needs a training of "
                    "its own: run the study first"
                )
        losses = [gamma_pair.read_losses(record.output(TRAIN, METRICS)) for record in records]
        found.append(gamma_pair.compare(gamma, rewritten, *losses))
    if found:
        gamma_pair.write(found, study_folder(study, root) / GAMMA)
    return found
