def write(result):
    pass
