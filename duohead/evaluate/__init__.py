"""Measuring what accuracy remains when most heads stream, and showing it.

Every score is read off the same samples for all methods and carries the bytes of the cache that made it. Use
`evaluate_needle` for the figures and `duohead demo` for the whole story on one page.
"""
