"""Lessons, and copies of the project to work in: exercises and bug hunts."""
