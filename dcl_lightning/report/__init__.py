"""The report of a run: its content, and its form as text, figures and files."""
