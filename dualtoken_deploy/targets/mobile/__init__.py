"""What the targets for phones and small boards share: the torch program that their converters take."""
