"""What training needs beside the loop of train.py: its folder and log, other processes, the machine, and what is measured."""
