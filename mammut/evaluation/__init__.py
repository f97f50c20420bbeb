"""Figures that can be compared with published ones, for a checkpoint and for an exported bundle alike: `mammut-eval`.

    examples.py         what an evaluation set is made of; pictures are read when their turn comes
    read_*.py           the data sets' published file formats
    sets.py             from what a user names to a task with its data
    predictor.py        a bundle or a checkpoint as the five things that tasks need
    task_*.py           one task each: from examples to scores
    caption_scores.py, vqa_accuracy.py, recall.py, average_precision.py, bootstrap.py, probe.py, corruptions.py
                        the measures themselves
    report.py, page.py  the terminal, JSON, and a page to look at

Nothing here trains, and only checkpoint_*.py need PyTorch: bundles are judged on the device that runs them.
"""
