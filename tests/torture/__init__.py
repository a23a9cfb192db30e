"""Faults made for real, while everything that is called and answered is written down and checked afterwards."""
