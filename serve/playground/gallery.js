// The pictures on the page, the newest request first.

class Gallery {
  constructor() {
    this.list = byId("gallery");
    this.pictures = [];
  }

  get isEmpty() {
    return !this.list.childElementCount;
  }

  get finished() {
    return this.pictures.filter((picture) => picture.isFinished);
  }

  add(pictures) {
    this.pictures.unshift(...pictures);
    this.list.prepend(...pictures.map(({ node }) => node));
  }

  /** Remove a picture; the focus goes to its neighbour. */
  remove(picture) {
    const hadFocus = picture.node.contains(document.activeElement);
    const near = picture.node.nextElementSibling ?? picture.node.previousElementSibling;
    picture.node.remove();
    this.pictures = this.pictures.filter((each) => each !== picture);
    if (hadFocus) (near?.querySelector("button:enabled") ?? byId("image-prompt")).focus();
  }

  /** A note in the place of pictures that will not come. */
  replace(pictures, note) {
    pictures[0].node.before(note);
    for (const picture of pictures) this.remove(picture);
  }
}
