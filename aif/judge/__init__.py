"""Judging: comparison x principle x order -> verdicts -> labels.

    protocols     what a call shows, and how its answer becomes a number
    judge         the calls of a comparison, what they ask, and their verdicts
    aggregate     verdicts -> the label of a judge -> the label of a panel
    panel         one judge or several: which calls a comparison needs, and its label
    calls         which calls are missing, and asking them
    provenance    what a labelling used, and what changed since the last one
    live          the judge as a reward, in training

Each imports only from those above it.
"""
