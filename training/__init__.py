"""What train.py uses: other processes, the run's folder and log, metrics, CUDA graphs, the host."""
