package org.dualtoken.demo

import android.graphics.Bitmap

/** The part of a picture that the model sees: left, top, width, height. */
data class Crop(val left: Int, val top: Int, val width: Int, val height: Int)

/**
 * The centre of a picture, of the input's proportions; its longer fit is cropRatio of what would fit.
 *
 * The same part that the bundle was validated on, which first scales the picture to size / cropRatio and then cuts.
 */
fun crop(pictureWidth: Int, pictureHeight: Int, contract: Contract): Crop {
    val scale = maxOf(contract.width.toDouble() / pictureWidth, contract.height.toDouble() / pictureHeight)
    val width = Math.round(contract.cropRatio * contract.width / scale).toInt().coerceIn(1, pictureWidth)
    val height = Math.round(contract.cropRatio * contract.height / scale).toInt().coerceIn(1, pictureHeight)
    return Crop((pictureWidth - width) / 2, (pictureHeight - height) / 2, width, height)
}

/** RGB bytes, rows from the top, of the model's size. Android scales bilinearly, the validation did so bicubically. */
fun pixels(picture: Bitmap, contract: Contract): ByteArray {
    val part = crop(picture.width, picture.height, contract)
    val cut = Bitmap.createBitmap(picture, part.left, part.top, part.width, part.height)
    return rgb(Bitmap.createScaledBitmap(cut, contract.width, contract.height, true))
}

fun rgb(bitmap: Bitmap): ByteArray {
    val colors = IntArray(bitmap.width * bitmap.height)
    bitmap.getPixels(colors, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
    val bytes = ByteArray(3 * colors.size)
    for ((i, color) in colors.withIndex()) {
        bytes[3 * i] = (color shr 16).toByte()
        bytes[3 * i + 1] = (color shr 8).toByte()
        bytes[3 * i + 2] = color.toByte()
    }
    return bytes
}
