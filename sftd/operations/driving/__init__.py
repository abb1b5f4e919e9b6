"""Operations with which a daemon drives attempts."""
