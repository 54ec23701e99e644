"""The live view: a compact answer of the server, the terminal view `moelb top`, and a page.

One noun per arrow: status -> `Live` (`answer`, in the server) -> `View` (`poller`, with its age) ->
frame (`frame`, lines of text that fit the terminal). The page draws the same `Live` in a browser.
"""
