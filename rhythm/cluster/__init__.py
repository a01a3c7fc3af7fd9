"""Runs the engines in separate processes on one machine or several: placement, remote calls, recovery from losses."""
