"""A study's YAML -> frozen, checked runs. Nothing below this package sees YAML.

run.py       the sections of a run, and which settings make sense together
compose.py   defaults <- base.yaml <- study.yaml <- command line, one layer at a time
study.py     a study's folder -> its list of runs
"""

from lyco_lab.config.run import (
    Data,
    Embedding,
    Evaluate,
    Generate,
    Model,
    Run,
    Train,
    Trainer,
    Wandb,
)
from lyco_lab.config.study import Study, load_study

__all__ = [
    "Data",
    "Embedding",
    "Evaluate",
    "Generate",
    "Model",
    "Run",
    "Study",
    "Train",
    "Trainer",
    "Wandb",
    "load_study",
]
