"""The program that holds the sandboxes' network: its namespace, its rules, its TAPs."""
