"""What the loop in train.py uses: other processes, the run's folder and log, metrics, the machine."""
