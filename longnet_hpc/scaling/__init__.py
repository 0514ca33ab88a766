"""Forecasts of runs on machines that are not here, measurements of how runs scale, and reports of both."""
