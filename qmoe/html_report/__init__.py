"""The report on a quantized folder as one HTML page; report.py is the way in."""
