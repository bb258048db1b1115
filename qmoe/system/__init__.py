"""The machine: processes, devices, files, memory, locks, progress."""
