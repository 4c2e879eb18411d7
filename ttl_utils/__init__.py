"""Shared code of the TeenyTinyLlama reproduction: six notebooks tell the story, this package does the work."""

import os
import warnings

# libraries announce what a reader of a notebook cannot use; set before any of them is imported
for _name, _value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}.items():
    os.environ.setdefault(_name, _value)

# progress bars as widgets: a notebook of ours shows one line that updates, and needs no widgets
warnings.filterwarnings("ignore", message="IProgress not found")
