"""`moelb doctor`: what is installed, which seams hold, what hardware there is, what would work.

`facts` are the nouns, `probe` finds them on this machine, `parse` reads nvidia-smi, `judge` turns
facts into rows with a fix each, `show` prints them. Only `probe` touches the machine.
"""
