"""The commands: `ftwt NAME --FLAG=VALUE ...`.

Each is a module (or a package) of its name in this folder: `COMMAND` there says which words it takes and declares its
flags, and `run` does the work. A new command is one such file and one line here.
"""

# Name and one line of help. The modules are imported when they are run, since each needs libraries of its own.
COMMANDS = {
    "train": "train a baseline, then its gates; resumes automatically where it stopped",
    "estimate": "predict the MACs reduction from a trained baseline",
    "evaluate": "accuracy, work and gates on the held-out split",
    "predict": "the classes of image files, and the work that each took",
    "report": "a page about runs: plots, images, and the commands that reproduce them",
    "plan": "memory, collectives and the shortest step on a TPU slice that you need not have",
    "prepare": "download a TFDS data set, once, in the format that training reads; or sort a folder by class",
    "convert": "a workdir from a PyTorch checkpoint, dense or gated",
    "export": "a workdir's network as a file for PyTorch, or as a program",
    "benchmark": "time saved by gates, cost of training them, or images/s of the input",
}
