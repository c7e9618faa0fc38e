"""The page in a browser that plans and starts trainings, on the code of train.py and of the queue.

The server imports no torch: what needs it runs in a process of its own (`worker`), and so does every training.
"""
