"""Histories of programs on several mounts, and the checker that decides whether one truth explains them.

    agent     a program that makes random calls on one mount and records each with its start and its end
    runner    starts agents on several directories (views of one) and gathers what they recorded
    record    the recorded calls, and the file they are kept in
    models    what a directory tree, a file's content and a lock may answer
    linear    the search for an order of the calls, each between its start and its end
    check     cuts a history into independent pieces, searches each, tells what is wrong in few lines

`python -m tests.history run DIR DIR ...` and `python -m tests.history check FILE`.
"""
