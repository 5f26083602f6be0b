"""Data, teacher, student training and evaluation. Imports `engine`; never forks its model."""
