"""How sampling, scoring and learning share their time: `schedule` says who waits for whom, `feed` carries samples to
their teachers, `arrivals` puts what comes back in order, `timeline` writes down who was busy when. No losses here.
"""
