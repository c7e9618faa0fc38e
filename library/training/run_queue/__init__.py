"""Trainings that wait for their turn: a folder of jobs, and the processes that run them (`tools/run_queue.py`).

The state of a job is the name of its file, and every change of it is one rename: nothing is half done after a kill, and
of several queues one wins. Nothing here imports torch.
"""
