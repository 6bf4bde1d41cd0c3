"""The web page of `sample --serve`.

`server` starts it, `guard` decides which requests it answers, `layout` shows it, `browser` is its style and
its script, `form` turns the values of its controls into requests, `uploads` keeps the images that visitors
send, and `clicks` computes what they ask for.
"""
